"""The same repository and protocol on a Ray cluster: replicas, autoscaling and placement are Ray Serve's.

Each version of each model is a deployment whose replicas are whole servers without listeners, with the scheduler, limits
and statistics of :mod:`narrowcast.serving`. One more deployment, the ingress, reads which model a request is for.
"""
