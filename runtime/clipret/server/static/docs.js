// Displays the OpenAPI document of the service.

import { $, fetchJson, make } from "./page.js";

const code = (text) => make("code", {}, text);

function kind(schema, all) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map((option) => kind(option, all)).filter((name) => name !== "null").join(" or ");
  if (schema.type === "array") return `list of ${kind(schema.items, all)}`;
  const limits = [schema.minimum, schema.maximum].filter(Number.isSafeInteger);
  return schema.type + (limits.length === 2 ? ` ${limits.join(" to ")}` : "");
}

function table(rows) {
  return make("table", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((cell) => make("td", {}, cell)))));
}

function route(path, method, operation, all) {
  const heading = make("h2", {}, code(`${method.toUpperCase()} ${path}`));
  const section = make("section", {}, heading, make("p", {}, operation.summary ?? ""));
  if (operation.description) section.append(make("p", {}, operation.description));
  const parameters = (operation.parameters ?? []).filter((parameter) => parameter.in !== "header");
  if (parameters.length) {
    const rows = parameters.map(({ name, schema, description }) => [code(name), kind(schema, all), description ?? ""]);
    section.append(table(rows));
  }
  for (const [type, body] of Object.entries(operation.requestBody?.content ?? {})) {
    section.append(make("p", {}, code(type), ` ${kind(body.schema, all)}`));
    const properties = Object.entries(body.schema.properties ?? {});
    if (properties.length) {
      section.append(table(properties.map(([name, value]) => [code(name), kind(value, all), value.description ?? ""])));
    }
  }
  const response = Object.values(operation.responses["200"]?.content ?? {})[0];
  if (response?.schema) section.append(make("p", {}, `Returns ${kind(response.schema, all)}.`));
  return section;
}

const api = await fetchJson("openapi.json");
const schemas = api.components.schemas;
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) $("routes").append(route(path, method, operation, schemas));
}
for (const [name, schema] of Object.entries(schemas)) {
  if (!schema.properties || name.startsWith("HTTPValidation") || name === "ValidationError") continue;
  const rows = Object.entries(schema.properties).map(([field, value]) => [
    code(field), kind(value, schemas), value.description ?? "",
  ]);
  $("routes").append(make("section", {}, make("h2", {}, name), make("p", {}, schema.description ?? ""), table(rows)));
}
