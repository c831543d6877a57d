"""EchoDistill (arXiv 2510.20512): a new concept for a one-step text-to-image student."""
