"""From a budget to the artifact that meets it: candidates, measurements, and the next candidate."""
