"""The pages that a browser gets, whole: no build step, and nothing from another host."""
