"""The student's side: datasets, batches, epoch order and exact resume."""
