"""Library of the pipeline's steps, which are the scripts in the folder above."""
