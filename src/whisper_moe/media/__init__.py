"""Media: bytes to arrays on the way in, arrays to bytes on the way out."""
