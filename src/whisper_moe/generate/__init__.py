"""States to outputs: search, timestamps, transcripts and their files."""
