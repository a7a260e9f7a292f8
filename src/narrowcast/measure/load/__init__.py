"""What a load on a server measures: records of requests, what they support as numbers, and whether to trust them."""
