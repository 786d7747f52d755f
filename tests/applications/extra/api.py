from __future__ import annotations

from django.contrib.auth import get_user_model
from rest_framework import permissions, routers, serializers, viewsets
from rest_framework.decorators import action, api_view, throttle_classes
from rest_framework.parsers import FileUploadParser
from rest_framework.response import Response
from rest_framework.throttling import AnonRateThrottle
from rest_framework.views import APIView

from tests.applications.extra.models import Item


class ItemSerializer(serializers.ModelSerializer):
    class Meta:
        model = Item
        fields = ["url", "name", "price", "since", "sheet"]


class ItemViewSet(viewsets.ModelViewSet):
    queryset = Item.objects.all()
    serializer_class = ItemSerializer
    permission_classes = [permissions.IsAuthenticatedOrReadOnly]

    @action(detail=True, methods=["post"])
    def free(self, request, pk=None):
        item = self.get_object()
        item.price = 0
        item.save()
        return Response(self.get_serializer(item).data)


class UserSerializer(serializers.ModelSerializer):
    class Meta:
        model = get_user_model()
        fields = ["url", "username", "email"]


class UserViewSet(viewsets.ReadOnlyModelViewSet):
    queryset = get_user_model().objects.order_by("username")
    serializer_class = UserSerializer
    permission_classes = [permissions.IsAdminUser]


class Upload(APIView):
    parser_classes = [FileUploadParser]

    def put(self, request, filename):
        file = request.data["file"]
        return Response({"name": file.name, "size": file.size}, status=201)


class Once(AnonRateThrottle):
    rate = "1/day"
    scope = "once"


@api_view(["GET"])
@throttle_classes([Once])
def throttled(request):
    return Response({"once": True})


router = routers.DefaultRouter()
router.register("items", ItemViewSet)
router.register("users", UserViewSet)
