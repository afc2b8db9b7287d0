"""Two checkpoints beside each other: `tensors` says what each tensor of theirs is to ours, by the table in `relations`,
by `permutations` of rows and columns, and by `values` that are scaled or rounded."""
