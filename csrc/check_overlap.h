// Part of the standalone check: see check_overlap.cu.
#pragma once

// Runs every configuration `launches_per_case` times per shape between programmatically launched neighbours; 0 when all
// logits had the naive kernel's bits.
int check_overlap(int launches_per_case);
