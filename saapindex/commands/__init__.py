"""Commands of the command line, one module each; `saapindex.cli` registers them."""
