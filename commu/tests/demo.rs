//! What the tutorial shows in 五、进程间通信: whoever changes `main` changes this file, too.

use std::process::Command;

#[test]
fn values_go_in_order_from_one_process_to_another() {
    let run = Command::new(env!("CARGO_BIN_EXE_commu")).output().unwrap();
    assert!(run.status.success(), "{run:?}");
    let output = String::from_utf8(run.stdout).unwrap();

    // The two processes print at the same time, so only the order of each one's lines is certain.
    let (written, read): (Vec<&str>, Vec<&str>) = output
        .lines()
        .partition(|line| line.starts_with("Process to write: ") || line.starts_with("Put "));
    let writer = written[0]
        .strip_prefix("Process to write: ")
        .expect(&output);
    let reader = read[0].strip_prefix("Process to read: ").expect(&output);
    assert_ne!(writer, reader, "one process writes and reads: {output}");
    let values = ["A", "B", "C"];
    assert_eq!(written[1..], values.map(|v| format!("Put {v} to queue...")));
    assert_eq!(read[1..], values.map(|v| format!("Get {v} from queue.")));

    // No value is there before it is put.
    for (put, get) in written.iter().zip(&read).skip(1) {
        assert!(output.find(put) < output.find(get), "{output}");
    }
}
