from __future__ import annotations

from django import forms

from .models import Comment


class CommentForm(forms.ModelForm):
    class Meta:
        model = Comment
        fields = ["name", "text"]
        widgets = {
            "name": forms.TextInput({"autocomplete": "name"}),
            "text": forms.Textarea({"rows": 5}),
        }


class SearchForm(forms.Form):
    q = forms.CharField(
        label="Search for",
        min_length=2,
        max_length=100,
        widget=forms.TextInput(
            {"type": "search", "placeholder": "bread, or “night train” -winter"}
        ),
    )
    year = forms.IntegerField(label="Year", min_value=2004, max_value=2100, required=False)
