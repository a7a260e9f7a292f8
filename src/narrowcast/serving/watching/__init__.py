"""What people and programs that run a server can see of it: logs, metrics, traces and a page in the browser."""
