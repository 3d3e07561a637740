"""One paper, one file: the rule, then the named method it makes."""
