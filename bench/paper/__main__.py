"""Makes the table; see `run`."""

from bench.paper.run import main

if __name__ == "__main__":
    main()
