"""The report of a run (`report.json`, `report.html`) and the comparison of several runs."""
