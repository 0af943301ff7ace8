"""From run folders to rows, and from rows to tables, figures and one page: `python -m massdpo.report --help`."""
