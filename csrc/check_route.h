// Part of the standalone check: see check_route.cu.
#pragma once

namespace jax_router_check {

// Routing of awkward shapes by every configuration, or of a few small ones; 0 when nothing was wrong.
int check_route(bool only_small);

}  // namespace jax_router_check
