"""Snapshots of a run: taken, kept in memory or on disk, and restored by a hard undo."""
