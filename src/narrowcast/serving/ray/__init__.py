"""The same repository and protocol on a Ray cluster: replicas, autoscaling and placement are Ray Serve's.

Each version of each model is an application whose replicas are whole servers without listeners, with the scheduler, limits
and statistics of :mod:`narrowcast.serving`. One process, the keeper, has the catalogue: it decides which versions there are
and which answer. One more application, the ingress, has a replica on each machine: it follows the keeper and sends each
request to the replicas of one version.
"""
