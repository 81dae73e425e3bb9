"""`python -m vcproxy` is `vcproxy`."""

from vcproxy.cli.main import main

main()
