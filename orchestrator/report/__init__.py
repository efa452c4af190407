"""``millrace report RUN``: a run as one self-contained HTML page."""
