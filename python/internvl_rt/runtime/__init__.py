"""What serves requests: batches, the paged KV cache, the scheduler, the memory plan."""
