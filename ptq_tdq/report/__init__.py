"""Pictures of an artifact: one self-contained HTML page, and the figures as files."""
