"""Django's own tests, run through tornjango: over an engine, every statement of the main thread in green code; or over the
bridge, every request of a test client through the server.

The command is ``bin/django-tests``; ``expected.txt`` and ``expected-bridge.txt`` list what fails and why.
"""
