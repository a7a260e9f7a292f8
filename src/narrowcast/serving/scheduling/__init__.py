"""Who runs when: queues, batches, deadlines and what is measured on the way."""
