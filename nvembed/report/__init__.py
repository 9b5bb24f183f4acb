"""Layer 6: report.json and report.html."""
