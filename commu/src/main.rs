//! One process puts values into a queue, and another one gets them out.
//!
//! The tutorial's section 五、进程间通信 (communication between processes), `demo2/commu.py`.
//! Run it with `cargo run -p commu`.

use std::error::Error;
use std::thread;
use std::time::Duration;

use multiprocessing::{Process, Queue};
use nix::unistd::getpid;

// The code that the writing process runs:
fn write(q: &Queue) -> Result<(), Box<dyn Error>> {
    println!("Process to write: {}", getpid());
    for value in ["A", "B", "C"] {
        println!("Put {value} to queue...");
        q.put(value)?;
        thread::sleep(Duration::from_secs_f64(rand::random::<f64>()));
    }
    Ok(())
}

// The code that the reading process runs:
fn read(q: &Queue) -> Result<(), Box<dyn Error>> {
    println!("Process to read: {}", getpid());
    loop {
        let value = q.get()?;
        println!("Get {value} from queue.");
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // The parent creates the Queue, and passes it to each child:
    let q = Queue::new()?;
    let mut pw = Process::new(write, &q);
    let mut pr = Process::new(read, &q);
    // Start the child pw, to write:
    pw.start()?;
    // Start the child pr, to read:
    pr.start()?;
    // Wait for pw to end:
    pw.join()?;
    q.join()?; // otherwise pr may be terminated before it has got all values, as in Python
    // The process pr is in an endless loop, so it cannot be waited for, only be terminated:
    pr.terminate()?;
    Ok(())
}

/// The part of Python's `multiprocessing` that this program needs, and that its tests use.
pub mod multiprocessing {
    use std::cell::RefCell;
    use std::error::Error;
    use std::io::{self, PipeReader, PipeWriter, Read, Write};
    use std::panic::{self, AssertUnwindSafe};
    use std::process::{ExitCode, Termination};

    use nix::errno::Errno;
    use nix::libc::_exit;
    use nix::sys::signal::{SIGCONT, SIGTERM, kill};
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, Pid, fork};

    /// A queue of texts with one reader: a pipe for the texts, and one for the answers to `join`.
    ///
    /// Its first call makes a process the reader (`get`) or a writer (`put`, `join`), and closes
    /// the other side's pipe ends in it; a call of the other side then fails. So start all
    /// processes that use the queue before their parent uses it. A process that has made no call
    /// holds all ends: the others do not notice that the reader or the last writer has ended, and
    /// may wait for ever.
    ///
    /// A text takes at least its length and 8 bytes of the pipe's room (64 KiB on Linux). If this
    /// sum is at most `PIPE_BUF` (4,096 bytes on Linux, 512 on macOS), several processes may put
    /// texts at once. While a longer text is put, no other process may call `put` or `join`; if the
    /// process that puts it is killed, the queue must not be used any more. Only one process at a
    /// time may be in `join`, since the answers carry no name, nor may it be killed there: its
    /// answer would be taken for another's.
    pub struct Queue {
        reader: Ends, // reads texts, writes answers
        writer: Ends, // reads answers, writes texts
    }

    /// The two pipe ends of one side; `None` in a process that is on the other side.
    type Ends = RefCell<Option<(PipeReader, PipeWriter)>>;

    /// What `join` writes in place of a text's length, which is never that large.
    const JOIN: [u8; size_of::<usize>()] = usize::MAX.to_ne_bytes();

    const OTHER_SIDE: &str = "this process is on the other side of the queue";
    // Reading and writing fail for these reasons only:
    const NO_READER: &str = "the reader of the queue has ended";
    const NO_WRITER: &str = "all writers of the queue have ended";

    impl Queue {
        /// Makes an empty queue. Fails if a pipe cannot be made.
        pub fn new() -> Result<Self, Box<dyn Error>> {
            let texts = io::pipe().map_err(|e| format!("pipe: {e}"))?;
            let answers = io::pipe().map_err(|e| format!("pipe: {e}"))?;
            Ok(Queue {
                reader: RefCell::new(Some((texts.0, answers.1))),
                writer: RefCell::new(Some((answers.0, texts.1))),
            })
        }

        /// Puts a text into the queue. Waits while there is no room; fails if the reader has ended.
        pub fn put(&self, value: &str) -> Result<(), Box<dyn Error>> {
            let mut writer = self.writer.borrow_mut();
            let (_, texts) = writer.as_mut().ok_or(OTHER_SIDE)?;
            self.reader.take(); // as long as a writer held the read end, no write would fail
            let message = [&value.len().to_ne_bytes(), value.as_bytes()].concat();
            texts.write_all(&message).map_err(|_| NO_READER.into())
        }

        /// Takes the next text out of the queue. Waits while there is none. Fails if all writers
        /// have ended, and each process that has the queue and has not called `get` counts as one;
        /// so to end a loop of `get`s, put a text that means the end, as in Python. Fails, too, if
        /// stdout cannot be flushed for a `join`, or if texts were mixed.
        pub fn get(&self) -> Result<String, Box<dyn Error>> {
            let mut reader = self.reader.borrow_mut();
            let (texts, answers) = reader.as_mut().ok_or(OTHER_SIDE)?;
            self.writer.take(); // as long as a reader held the write end, no end-of-file would come
            let mut length = [0; size_of::<usize>()];
            loop {
                texts.read_exact(&mut length).map_err(|_| NO_WRITER)?;
                if length != JOIN {
                    break;
                }
                // `terminate` usually comes next, and SIGTERM discards what is still buffered.
                io::stdout().flush().map_err(|e| format!("stdout: {e}"))?;
                // This fails if the process in `join` was killed. Other texts may be there still.
                let _ = answers.write_all(&[0]);
            }
            let mut value = vec![0; usize::from_ne_bytes(length)];
            texts.read_exact(&mut value).map_err(|_| NO_WRITER)?;
            Ok(String::from_utf8(value).map_err(|e| e.to_string())?)
        }

        /// Waits until the reader has asked for another text after the last one that was put, that
        /// is, has finished with all texts, like the `join` of Python's `JoinableQueue`. Fails if
        /// the reader has ended.
        pub fn join(&self) -> Result<(), Box<dyn Error>> {
            let mut writer = self.writer.borrow_mut();
            let (answers, texts) = writer.as_mut().ok_or(OTHER_SIDE)?;
            self.reader.take(); // as long as a writer held these ends, neither call would fail
            texts.write_all(&JOIN).map_err(|_| NO_READER)?;
            answers.read_exact(&mut [0]).map_err(|_| NO_READER.into())
        }
    }

    /// A child process that runs a function.
    ///
    /// A process that is dropped without `join` is not waited for, as with std's `Child`.
    pub struct Process<A, R> {
        target: fn(A) -> R,
        args: Option<A>,  // `None` once started
        pid: Option<Pid>, // `Some` from the start until it has been waited for
        terminated: bool, // `true` once `terminate` has sent SIGTERM
    }

    impl<A, R: Termination> Process<A, R> {
        /// Makes a process that will call `target(args)` once it is started.
        pub fn new(target: fn(A) -> R, args: A) -> Self {
            Process {
                target,
                args: Some(args),
                pid: None,
                terminated: false,
            }
        }

        /// Starts the child, which calls the target and ends. An error or a panic is printed to
        /// stderr, and shows as exit status 1, like each `ExitCode` but `SUCCESS`. `start` fails if
        /// stdout cannot be flushed or no process can be made, and panics if the process was
        /// started before.
        ///
        /// Call this only while the calling process has one thread: fork copies that thread alone,
        /// so a lock that another thread holds stays locked in the child for ever. (Strictly an
        /// `unsafe fn`; it is not one, so that `p.start()?` reads like Python.)
        pub fn start(&mut self) -> Result<(), Box<dyn Error>> {
            assert!(self.args.is_some(), "cannot start a process twice");
            // Otherwise the child prints what is still buffered as well.
            io::stdout().flush().map_err(|e| format!("stdout: {e}"))?;
            // SAFETY: the caller sees to it that this process has one thread, so the child is not
            // limited to async-signal-safe functions.
            match unsafe { fork() }.map_err(|e| format!("fork: {e}"))? {
                ForkResult::Child => {
                    let run = || {
                        // Otherwise the child may draw the same numbers as its parent.
                        rand::rng().reseed().expect("cannot reseed");
                        let status = self.args.take().map(self.target).map(R::report);
                        status == Some(ExitCode::SUCCESS)
                    };
                    // Never dropped before `_exit`: a panic's payload may panic again in its drop.
                    let ended = panic::catch_unwind(AssertUnwindSafe(run));
                    let ok = matches!(ended, Ok(true));
                    let flushed = io::stdout().flush().is_ok(); // since `_exit` does not flush
                    // SAFETY: `_exit` can always be called; unlike `exit`, it skips exit handlers.
                    unsafe { _exit(if ok && flushed { 0 } else { 1 }) }
                }
                ForkResult::Parent { child } => {
                    self.pid = Some(child);
                    self.args = None;
                }
            }
            Ok(())
        }

        /// Waits for the child to end, unless it has been waited for already. Fails unless the
        /// child's exit status is 0. Panics if the process was never started.
        pub fn join(&mut self) -> Result<(), Box<dyn Error>> {
            assert!(self.args.is_none(), "can only join a started process");
            let Some(pid) = self.pid.take() else {
                return Ok(());
            };
            loop {
                let failure = match waitpid(pid, None) {
                    Ok(WaitStatus::Exited(_, 0)) => return Ok(()),
                    Ok(WaitStatus::Signaled(_, SIGTERM, _)) if self.terminated => return Ok(()),
                    Ok(WaitStatus::Exited(_, status)) => format!("exited with status {status}"),
                    Ok(WaitStatus::Signaled(_, signal, _)) => format!("was killed by {signal}"),
                    Ok(_) | Err(Errno::EINTR) => continue, // the child has not ended yet
                    Err(e) => format!("cannot be waited for: {e}"),
                };
                return Err(format!("process {pid} {failure}").into());
            }
        }

        /// Sends SIGTERM to the child, and waits for it to end; a child that ignores SIGTERM is
        /// waited for until it ends by itself. Fails unless SIGTERM ended the child or its exit
        /// status is 0. Does nothing if the process was never started or has been waited for.
        pub fn terminate(&mut self) -> Result<(), Box<dyn Error>> {
            let Some(pid) = self.pid else {
                return Ok(());
            };
            // No other process has the child's id before the child is waited for. A child that is
            // stopped receives SIGTERM when SIGCONT continues it.
            let sent = kill(pid, SIGTERM).and_then(|()| kill(pid, SIGCONT));
            sent.map_err(|e| format!("process {pid} cannot be terminated: {e}"))?;
            self.terminated = true;
            self.join()
        }
    }
}
