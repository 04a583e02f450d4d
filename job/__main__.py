"""`python -m job`, the entrypoint of the container."""

from job.cli import main

if __name__ == "__main__":
    main()
