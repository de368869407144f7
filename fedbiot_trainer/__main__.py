"""`python -m fedbiot_trainer`, so that `accelerate launch -m fedbiot_trainer train ...` works."""

from .cli.main import main


main()
