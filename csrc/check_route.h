// Part of the standalone check: see check_route.cu.
#pragma once

#include "check_support.h"

namespace jax_router_check {

// Routing of awkward shapes by every configuration; 0 when nothing was wrong.
int check_route(Extent extent);

}  // namespace jax_router_check
