"""`python -m me_local`: the same as `me-local`."""

from me_local.cli import main

main()
