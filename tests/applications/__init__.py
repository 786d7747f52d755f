"""Real applications, served by Django's usual servers and by tornjango, and walked side by side.

`wagtail start` makes the project; `local.py` is its settings' supplement, with Django REST framework, allauth, the admin, and
`extra`, an app of views that Django's documentation shows. It knows nothing of tornjango.
"""
