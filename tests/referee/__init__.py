"""Django's own tests, run with every statement of the main thread going through green code and an engine.

The command is ``bin/django-tests``; ``expected.txt`` lists what fails and why.
"""
