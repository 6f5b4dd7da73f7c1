// Launches between programmatically launched neighbours: see check_overlap.cu and check_overlap_route.cu.
#pragma once

namespace jax_router_check {

// Each runs every configuration `launches_per_case` times per shape; 0 when all outputs had the expected bits.
int check_overlap(int launches_per_case);
int check_overlap_route(int launches_per_case);

}  // namespace jax_router_check
