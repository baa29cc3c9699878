"""The layers of a model: their graph, and ways to see them run."""
