"""Report: tables, figures and pages that people look at; it reads runs, rows and traces."""
