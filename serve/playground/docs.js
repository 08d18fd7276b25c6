// Swagger UI over this server's own description, with nothing from another host.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#reference", deepLinking: true, validatorUrl: null });
