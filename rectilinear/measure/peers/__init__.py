"""Other libraries, one file each, written the way each is fastest.

A file imports its library at the top: where that fails, the peer is missing.
"""
