// Swagger UI for this server's OpenAPI description. It loads nothing from another host.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#reference", deepLinking: true, validatorUrl: null });
