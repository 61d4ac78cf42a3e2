"""What several steps of the pipeline share; the steps themselves are the scripts in the folder above."""
