"""Artifacts: the folders that carry a model from the search to a runtime."""

from narrowcast.artifacts.manifest import Candidate, Evidence, Manifest, Measurement
from narrowcast.artifacts.store import Artifact, check_output_folder, load_artifact, save_artifact

__all__ = [
    "Artifact",
    "Candidate",
    "Evidence",
    "Manifest",
    "Measurement",
    "check_output_folder",
    "load_artifact",
    "save_artifact",
]
