"""Run methods through suites of questions, and measure them."""
