"""Teachers: whatever answers `teacher(batch)` with an output that a loss can ask for logits."""
