"""HTTP/1.1 on asyncio: connections, messages and limits. It knows nothing of inference."""
