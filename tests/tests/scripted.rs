//! Tool loops and forms of replies over the daemon's socket, with the model that says what it is told.

use anyhow::{Context, Result};
use flash_proto::v1::{
    self, GenerateRequest, Message, Tool, ToolCall, ToolChoice, done::Finish, generate_client::GenerateClient, generate_event::Event,
    generate_request::Prompt, tool_choice::Mode,
};
use flash_tests::scripted::serve;
use tokio::sync::oneshot;
use tonic::transport::Channel;

type Client = GenerateClient<Channel>;

#[derive(Debug, Default, PartialEq)]
struct Said {
    text: String,
    /// Name and arguments.
    calls: Vec<(String, String)>,
    finish: Option<Finish>,
}

async fn ask(client: &mut Client, request: GenerateRequest) -> Result<Said> {
    let mut stream = client.generate(request).await?.into_inner();
    let mut said = Said::default();
    while let Some(event) = stream.message().await? {
        match event.event.context("an event")? {
            Event::Text(text) => said.text += &text.text,
            Event::ToolCall(part) => {
                if part.index as usize == said.calls.len() {
                    said.calls.push((part.name, String::new()));
                }
                said.calls.last_mut().context("a call has begun")?.1 += &part.arguments;
            }
            Event::Done(done) => said.finish = Some(done.finish()),
            Event::Failed(failed) => anyhow::bail!("{failed:?}"),
            _ => {}
        }
    }
    Ok(said)
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into(), ..Message::default() }
}

fn tool(name: &str) -> Tool {
    let parameters_json = r#"{"type":"object","properties":{"cmd":{"type":"string"}},"required":["cmd"]}"#.into();
    Tool { name: name.into(), description: "Runs a command.".into(), parameters_json, ..Tool::default() }
}

fn chat(messages: Vec<Message>, mode: Mode) -> GenerateRequest {
    let choice = ToolChoice { mode: mode.into(), ..ToolChoice::default() };
    let chat = v1::Chat { messages, tools: vec![tool("exec_command"), tool("other")], tool_choice: Some(choice), ..v1::Chat::default() };
    let max_tokens = Some(300);
    GenerateRequest { prompt: Some(Prompt::Chat(chat)), max_tokens, ..GenerateRequest::default() }
}

fn called(arguments: &str) -> Said {
    Said { text: String::new(), calls: vec![("exec_command".into(), arguments.into())], finish: Some(Finish::ToolCalls) }
}

fn spoken(text: &str) -> Said {
    Said { text: text.into(), calls: Vec::new(), finish: Some(Finish::Stop) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scripted_model_calls_tools_and_keeps_to_forms() -> Result<()> {
    let home = tempfile::TempDir::with_prefix("fl")?;
    let (stop, stopped) = oneshot::channel::<()>();
    let (ready, listening) = oneshot::channel();
    let path = home.path().to_path_buf();
    let serving =
        tokio::spawn(async move { serve(&path, |socket| drop(ready.send(socket.to_path_buf())), async { drop(stopped.await) }).await });
    let mut client = GenerateClient::new(flash_proto::socket::connect(&listening.await?).await?);

    // One turn with a call, its result, and the answer.
    let directive = r#"Look. CALL[[["exec_command",{"cmd":"cat a.txt"}]]]END SAY[[It says 7.]]END"#;
    let mut messages = vec![message("system", "Be brief."), message("user", directive)];
    assert_eq!(ask(&mut client, chat(messages.clone(), Mode::Auto)).await?, called(r#"{"cmd":"cat a.txt"}"#));
    let call = ToolCall { id: "c1".into(), name: "exec_command".into(), arguments_json: r#"{"cmd":"cat a.txt"}"#.into() };
    messages.push(Message { tool_calls: vec![call], ..message("assistant", "") });
    messages.push(Message { tool_call_id: Some("c1".into()), ..message("tool", "7") });
    assert_eq!(ask(&mut client, chat(messages.clone(), Mode::Auto)).await?, spoken("It says 7."));
    // A later directive counts.
    messages.push(message("user", "SAY[[Never mind.]]END"));
    assert_eq!(ask(&mut client, chat(messages.clone(), Mode::Auto)).await?, spoken("Never mind."));

    // Shown, and none is called.
    let none = ask(&mut client, chat(vec![message("user", directive)], Mode::None)).await?;
    assert!(none.calls.is_empty() && none.text.starts_with("<tool_call>"), "{none:?}");
    // Whatever it wants to say, it calls the named tool.
    let mut named = chat(vec![message("user", "SAY[[No!]]END")], Mode::Required);
    if let Some(Prompt::Chat(chat)) = &mut named.prompt {
        chat.tool_choice = Some(ToolChoice { mode: Mode::Required.into(), names: vec!["other".into()], single: true });
    }
    assert_eq!(ask(&mut client, named).await?.calls.first().context("a call")?.0, "other");

    // A form that it wants to leave.
    let schema = r#"{"type":"object","properties":{"name":{"type":"string"}},"required":["name"],"additionalProperties":false}"#;
    let formed = |says: &str| GenerateRequest {
        prompt: Some(Prompt::Chat(v1::Chat { messages: vec![message("user", says)], ..v1::Chat::default() })),
        format: Some(v1::Format { kind: Some(v1::format::Kind::JsonSchema(schema.into())), strict: true }),
        max_tokens: Some(300),
        ..GenerateRequest::default()
    };
    assert_eq!(ask(&mut client, formed(r#"SAY[[{"name": "Ada"} is her name]]END"#)).await?, spoken(r#"{"name": "Ada"}"#));

    drop(stop);
    serving.await??;
    Ok(())
}
