"""The backends: `contract` says what one is, `registry` which one works, the other files are one backend each."""
