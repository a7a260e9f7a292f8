"""The numerics doctor: where the numbers of a training broke, and what mends it.

:class:`~narrowcast.training.doctor.watch.Watch` stands beside a run; :func:`~narrowcast.training.doctor.cause.first_cause`
looks at one step; :func:`~narrowcast.training.doctor.record.read` gives what was written.
"""
