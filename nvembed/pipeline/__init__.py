"""Running a pipeline: command line, run and dry run, attempts, log, signals, memory meter."""
