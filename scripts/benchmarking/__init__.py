"""The benchmark: this service beside what else one might do, measured in one run on one machine."""
