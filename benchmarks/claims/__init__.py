"""The claims of the paper (arXiv 2505.17412), each shown or refuted by one command; see docs/claims.md."""
