"""Where a view's pictures go besides the page: streams, recordings, single pictures."""
